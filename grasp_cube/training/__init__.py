"""Making datasets and training the small checkpoints that the repository ships."""
