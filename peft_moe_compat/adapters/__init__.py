"""Adapter files: opened, decided, inspected, converted, compared. Imports neither PEFT nor transformers by itself.

files, safetensors_io, tensors   bytes on disk, checked before they are believed; tensors read one at a time
adapter_config, ranks, names     the config, and the names and numbers of the LoRA in a file
base_model, stated               the base model's config; what the caller says
source, slots                    an adapter opened: every LoRA a typed slot with all of its numbers
shapes, packing, writer, stamp   what shapes, data, marks and stamps say; `decide` concludes from all of it
parts, shaping, plan             the experts' LoRA part by part, and as another reader takes it
readers, outputs, config         readers, what is written for them, and its adapter_config.json
inspect, convert, verify, merged  the public functions
"""
