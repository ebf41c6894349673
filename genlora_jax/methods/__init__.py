"""The methods of adaptation, a file each: what is trained, and the factors that it stands for."""
