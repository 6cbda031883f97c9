"""Generated from the .proto files beside it (`make proto`); checked in, and CI regenerates and compares."""
