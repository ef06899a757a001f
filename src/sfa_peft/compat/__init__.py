"""Registration with PEFT, and all patches of PEFT and transformers. To be checked at each of their releases."""
