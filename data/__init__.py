"""VOC devkit reading, the 480×480 frame's geometry, views, jitter and the synthetic devkit.

Imports nothing of ours. Only `data.collate`, and the downloader when it is called, need torch; everything else is
numpy and Pillow, so that the store can be read without torch.
"""
