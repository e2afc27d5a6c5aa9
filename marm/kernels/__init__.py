"""The loops of scoring as vector instructions, compiled for this CPU when a model is loaded."""
