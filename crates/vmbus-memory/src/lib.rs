//! Memory shared with a peer that may change it at any moment: guest memory, page runs, ring mappings
