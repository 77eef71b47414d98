"""Reinforcement learning for text-to-image diffusion models (DDPO, arXiv 2305.13301).

This package is the library: it knows neither Prefect nor MLflow. ``tasks/`` and ``flows/`` wire it.
"""

__version__ = "0.1.0"
