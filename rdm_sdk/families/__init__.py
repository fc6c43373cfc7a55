"""Base models: one adapter per diffusers family behind one protocol, and the roles that share one base."""
