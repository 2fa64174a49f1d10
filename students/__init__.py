"""Students: backbones, neck, Faster R-CNN, adapters and distillation losses."""
