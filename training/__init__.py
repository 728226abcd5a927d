"""Simulated and real plates in, a meta-trained network and its bundle out. Never imports ``service``."""
