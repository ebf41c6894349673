"""GenLoRA and its relatives on a real instruction-tuned model: validation loss and accuracy."""
