module bedplate.example/reader

go 1.19
