"""Several devices and pods that train one model."""
