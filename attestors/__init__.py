"""Attestors: one file each, all of them speaking contract.py. Nothing here imports the broker."""
