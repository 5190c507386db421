"""Experts balanced by real processes: what a step takes on the wall clock, and what ran beside what.

routes    which experts tokens go to: recorded, made with a skew, or even
rank      one rank of a live run: several arms, in turns, in one process group
timeline  figures, a picture and a trace of what ran and what was carried when
"""
