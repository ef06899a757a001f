"""Registration with PEFT, and every patch of PEFT and transformers: the folder to look through at each release."""
