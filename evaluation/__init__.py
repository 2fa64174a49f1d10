"""VOC average precision, teacher checks and pictures. Never imports torch."""
