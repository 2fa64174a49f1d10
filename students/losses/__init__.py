"""Distillation losses: pure functions of student and teacher tensors, one file a family.

Axes, in every file: B images, C channels of the teacher, H × W places of its grid, K classes, P proposals.

What all of them promise: the result is a scalar; it is computed in float32 (float64 where the student is) whatever
dtypes come in and whether or not autocast is on; no gradient reaches the teacher; shapes that do not belong together
raise ValueError. Feature losses take the teacher as `standardise` gives it. They are means over images, so that two
halves of a batch average to the whole; only `pearson` looks across images.
"""
