"""What specpass does with a pair of models, found out without their weights."""
