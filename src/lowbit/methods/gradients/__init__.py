"""Methods that overcome the step's missing derivative."""
