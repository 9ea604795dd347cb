"""Training of image and text towers with the contrastive loss."""
