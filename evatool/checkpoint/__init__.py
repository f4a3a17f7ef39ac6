"""Training state on disk: written so that no crash leaves a half-written checkpoint, read only when it is whole."""
