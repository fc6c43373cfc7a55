"""Rewards: one contract for distribution matching, pixel rewards and a stranger's callable."""
