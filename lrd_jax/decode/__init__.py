"""Decoding: belief maths, the decode state, its two phases and the loop."""
