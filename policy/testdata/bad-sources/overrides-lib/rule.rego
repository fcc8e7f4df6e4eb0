package lib

containers := set()
