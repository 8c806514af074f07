"""What is true of a model: its LoRA layers, attention, masks, quantised bases and losses."""
