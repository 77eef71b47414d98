"""The stages of training, a module each."""
