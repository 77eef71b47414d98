"""How rewards become advantages, and advantages gradients: pure tensors, one algorithm a file."""
