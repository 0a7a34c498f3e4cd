"""Context extension: settings of a loaded model that let it read further than it was trained to."""
