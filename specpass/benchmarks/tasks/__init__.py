"""What is asked: RULER and code tasks, and the prompts made of them."""
