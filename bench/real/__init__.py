"""The toy's experiment on a real language model: a small chat model, aligned, fine-tuned, defended, tuned, judged."""
