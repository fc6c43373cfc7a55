"""Rewards that run elsewhere: a server for any of them, and rewards that ask one."""
