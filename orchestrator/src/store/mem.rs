//! P: the model.
