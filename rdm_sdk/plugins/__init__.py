"""Rewards and model families that other packages bring: hooks, discovery, and a template for new ones."""
