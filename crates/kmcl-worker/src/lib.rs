//! A ready-made thread that drives many KMCL channels
