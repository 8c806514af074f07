"""The whole pipeline from one configuration: its order, its folder, its cost beforehand, and the built-in demo."""
