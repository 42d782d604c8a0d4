"""The only code that touches somebody else's objects: what is replaced in PEFT and transformers, and put back."""
