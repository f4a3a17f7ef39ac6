"""What is learned: models and a batch in, losses out."""
