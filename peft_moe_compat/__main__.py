"""`python -m peft_moe_compat` is `peft-moe-compat`."""

from .cli.main import app

app(prog_name="peft-moe-compat")
