"""Adapter files: opened, decided, inspected, converted, compared. Imports neither PEFT nor transformers by itself.

files, safetensors_io, tensors   bytes on disk, checked before they are believed; tensors read one at a time
bounds, renaming                 what no adapter has more of; paths called otherwise
adapter_config, ranks, names     the config, and the names and numbers of the LoRA in a file
patterns, targets                its patterns and target_parameters, matched as PEFT matches them
base_model, stated               the base model's config; what the caller says
source, slots                    an adapter opened: every LoRA a typed slot with all of its numbers
shapes, packing, writer, stamp   what shapes, data, marks and stamps say; `decide` concludes from all of it
health, contents                 what the numbers show: of one projection, of the whole file
conclusions, steps               what is concluded and done, as values with their sentences
parts, shaping, orientations     the experts' LoRA part by part, and how releases lay it out
readers, refit, outputs, config  what each reader takes; what is written for it, and its adapter_config.json
rewriting                        what PEFT makes of the names in that
plan, verdicts, proof            a conversion, before anything is read; what it would change, as a reader's verdict
checkpoint, stored, placing      a base checkpoint, how it stores its weights, and which of them an adapter updates
inspect, convert, verify, merge, verify_merge   the public functions
"""
