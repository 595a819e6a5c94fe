"""Slow and plain implementations that the fast ones are held against."""
