"""Knowledge distillation: losses as pure functions, adaptors as small modules, one file a method."""
