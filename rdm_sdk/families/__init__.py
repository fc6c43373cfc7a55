"""Base models: one class per diffusers family behind one protocol, and the roles that share one base."""
