"""Teachers: names, loading, preprocessing, prompts, patch grids. Teacher libraries are imported when one is built."""
