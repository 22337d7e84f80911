"""From a published config to the parts of the model, one file per family of architectures."""
