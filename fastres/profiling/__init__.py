"""Measuring training steps and loaders, and the roofline that limits a step."""
