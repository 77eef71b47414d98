"""From noise to images: denoising processes, windows of steps, sampling."""
