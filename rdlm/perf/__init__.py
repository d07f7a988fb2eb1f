"""What a model costs: counted from its shape (flops), and read from programs compiled for TPUs (hlo)."""
