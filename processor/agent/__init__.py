"""How the messages of an owner become calls of a TableExecutor."""
