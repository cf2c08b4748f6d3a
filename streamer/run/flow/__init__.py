"""What flows through a pass: steps, their tensors, what is computed and how it reaches its place."""
