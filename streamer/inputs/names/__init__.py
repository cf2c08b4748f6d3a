"""What an input's tensors are called, and what the aligned checkpoint calls them."""
