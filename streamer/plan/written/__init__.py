"""What will be written, and where: files, their layout, what lies at their places."""
