"""FSDP2: LoRA on the experts of a Qwen3-MoE over two processes, saved as the file of one.

    torchrun --nproc-per-node 2 examples/two_gpus.py [FOLDER]

Runs on two GPUs over NCCL, and where there are none on two CPU processes over gloo.
"""

import os
import sys
import tempfile

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

import peft_moe_compat

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "vocab_size": 128}


def main(folder: str) -> None:
    rank, on_gpu = int(os.environ["RANK"]), torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")

    torch.manual_seed(0)  # the same weights on every rank
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", use_cache=False, **SIZES, **EXPERTS))
    targets = peft_moe_compat.expert_parameters(model)
    model = get_peft_model(model, LoraConfig(r=8, target_modules=[], target_parameters=targets)).to(device)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)

    torch.manual_seed(rank + 1)  # other tokens on every rank
    tokens = torch.randint(128, (4, 32), device=device)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for step in range(5):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"rank {rank}, step {step}: loss {loss.item():.3f}")

    # Gathered by all ranks, given to the first, which writes one file: any number of ranks can load it.
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(folder, state_dict=state)
        print(f"saved to {folder}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
